"""Several machines or processes that run one model together: bytes between ranks, and sums of tensors."""
