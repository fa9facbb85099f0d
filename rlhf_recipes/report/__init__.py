"""What came of a run: facts, verdict, pages."""
