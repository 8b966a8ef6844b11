"""Attention over pages of keys and values: prefill of a chunk of queries, and decode of one query per request."""
