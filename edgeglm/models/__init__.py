"""The networks: teachers behind one door, and the light towers that learn from them."""
