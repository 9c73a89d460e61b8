"""Who is compared: each contestant starts and stops a pair of proxies with mutual TLS between them on a `bench.stage.Stage`."""
