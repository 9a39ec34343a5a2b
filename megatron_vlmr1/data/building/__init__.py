"""From other people's files to shards: sources, a survey that fixes what goes where, and the writing of one shard."""
