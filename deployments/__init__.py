"""The Ray Serve and HTTP edges of the cluster: one file per deployment, thin. No algorithm lives here."""
