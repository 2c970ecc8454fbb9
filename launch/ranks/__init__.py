"""Ranks as local processes or Ray actors: started, joined to one mesh, and watched until all have ended."""
