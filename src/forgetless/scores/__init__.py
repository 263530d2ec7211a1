"""Scores once they are measured: kept, looked up, compared, limited and shown."""
