"""Evidence beside one prediction of one round: what every coalition of clients would have made."""
