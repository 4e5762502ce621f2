"""Encoders on their way out: written as other libraries load them, and compared there first."""
