"""Reading, checking and changing configs of MMDetection and MMSegmentation."""
