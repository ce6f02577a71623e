"""Mixture of experts, as pure math: the router, where tokens go, the experts."""
