"""Choosing the documents to train on: quality filters, deduplication, decontamination.

Each dropped document has a reason.
"""
