"""Protocol engines: values that turn received bytes into decisions and bytes to send. No socket, clock, random, log or await."""
