"""Rule-based rewards and the processes that compute them."""
