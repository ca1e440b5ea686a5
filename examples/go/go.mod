module tandem-chat

go 1.19
