"""What lies on disk: runs, stages, locks, fingerprints."""
