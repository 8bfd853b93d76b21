"""Thumbs become training data: events in, preference pairs and unpaired rows out."""
