"""Row and column permutations under which a matrix is nearest to a sum of Kronecker products."""
