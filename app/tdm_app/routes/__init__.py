"""The endpoints, one file per resource. Each is a function from the service to a router, so nothing is global."""
