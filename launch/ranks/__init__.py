"""Ranks: started as local processes or Ray actors, joined to one mesh, and watched until all have ended."""
