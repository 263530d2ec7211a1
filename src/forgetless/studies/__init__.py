"""Runs and studies as resumable folders, and who does them."""
