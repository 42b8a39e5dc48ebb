"""Values of merged weights: computed in float64, rounded once."""
