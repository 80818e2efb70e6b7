"""Is a peer honest: Bloom filters, Merkle trees, commitments, similarity of results."""
