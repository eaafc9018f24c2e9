"""HTTP interface of the roles: health, metrics, and the validator's API."""
