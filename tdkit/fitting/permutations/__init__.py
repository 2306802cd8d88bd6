"""The search for the row and column orders in which a matrix is nearest to a Kronecker sum."""
