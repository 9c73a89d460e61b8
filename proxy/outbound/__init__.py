"""What the app calls: from a dialled address to an authenticated endpoint. `serve` is the path, one line per step."""
