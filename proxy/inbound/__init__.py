"""What calls the app: from an accepted connection to a permitted request. `serve` is the path, one line per step."""
