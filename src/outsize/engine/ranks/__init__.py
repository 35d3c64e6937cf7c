"""Several processes that run one model: the leader's side, and the side of those that follow."""
