"""Moving bytes: accepting, sniffing, dialling, TLS records, and the relay loop that carries established connections."""
