"""Streams: the log in, new records and lists out."""
