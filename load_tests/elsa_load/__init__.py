"""Load tests of OpenAI-compatible endpoints: scenarios as data, a streaming client, interleaved A/B with intervals."""
