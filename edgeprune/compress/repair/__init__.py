"""What a cut model gets back without a gradient step: weights by least squares, and statistics of its batch norms."""
