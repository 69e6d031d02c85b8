"""The networks that denoisers are made of."""
