"""Side-by-side measurements of Pillion, Envoy and HAProxy in one interleaved run on one machine: `python -m bench`."""
