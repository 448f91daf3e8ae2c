"""Arrays of any library: what goes into a store and what comes out."""
