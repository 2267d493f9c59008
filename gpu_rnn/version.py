"""The version, where the build reads it without importing anything."""

VERSION = "0.1.0"
