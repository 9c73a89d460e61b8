"""Who a workload is: the certificate authority, the service that certifies against tokens, the client that keeps a sidecar certified."""
