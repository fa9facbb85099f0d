"""From a name to a folder: hub, mirror, trust."""
