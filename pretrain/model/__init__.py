"""The model, pure math: tensors in, tensors out. It uses no process group, no environment, no file.

Shape suffixes: B batch, S sequence, T tokens (B*S) or cached keys, C tokens of a chunk, D model width, H query heads,
G key/value heads, K head width, F hidden width of the MLP, V vocabulary, L layers, N documents.
"""
