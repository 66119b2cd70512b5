"""mpass"""
