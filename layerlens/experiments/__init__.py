"""Many runs: what a study is, where its runs lie, who runs them, what comes out."""
