"""The native engine: plain PyTorch with FSDP2, DTensor and torch.distributed.pipelining."""
