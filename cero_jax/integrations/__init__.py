"""The allocator inside other people's trainers: TRL and Tunix. docs/integrations.md says how, and what about verl."""
