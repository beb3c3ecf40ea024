"""Laws: executable properties that admit an architecture; ``check`` holds one against them."""

from stepladder.laws.check import LAWS, Finding, check, probe
from stepladder.laws.law import Law, Subject, Violation

__all__ = ["LAWS", "Finding", "Law", "Subject", "Violation", "check", "probe"]
