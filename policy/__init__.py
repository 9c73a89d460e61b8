"""Who may do what: the typed policy, how a request is matched and authorized, and the controller that serves it to sidecars."""
