"""The shared vocabulary of Pillion: identities, addresses, references, settings and the small runtime every component stands on.

Nothing in here imports another Pillion package; every other package may import this one.
"""
