"""The scheduler service: decides what each step computes. Holds no tensor and never imports torch."""
