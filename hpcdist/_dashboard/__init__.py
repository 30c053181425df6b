"""The page that shows what the cluster is doing, and the server it comes from."""
