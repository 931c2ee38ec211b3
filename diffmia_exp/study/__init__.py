"""What each factor does to what a model leaks: grids that sweep one key, read together, drawn and written down."""
