"""Several hosts, namespaces of this machine: both engines beside Gloo, MXNet, Ray and bare TCP."""
