"""Federated analytics: means, variances, quantiles and histograms of data that stay with their sites, without a model.

Sites answer questions whose answers add up, and only the sum is of interest. A question is a round. Counts, least and
greatest values and histograms are exact; means and variances are those of the pooled data up to rounding; a quantile is
found by histograms that narrow it down round by round, to any error that is asked for, down to none.

An answer is a number about the site's own data, which the analyst sees before it adds it up. A site is protected only
by what it refuses: with the hyperparameter ``leastCount`` a site does not answer for a column of which it has fewer values. This
is no differential privacy: exact quantiles are values that somebody has.
"""
