"""A mixture of experts in place of a layer's MLP: router, balance of the load, dispatch of tokens, experts.

Pure math of one process. `parallel.expert` gives the experts to different ranks: it replaces a layer's `dispatcher` and
the router's `row_ranks`.
"""
