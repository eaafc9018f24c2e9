"""How validators reach each other."""
